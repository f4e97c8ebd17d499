"""Passwords and keys: refused before anything is written, and in no output of a command that was given them rightly."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from datamodules.synthetic.benchmark_replicas import write
from experiments import ablations, evaluate, pipeline, synthesize, train
from experiments.runs.commands import command, refuse_credentials
from experiments.runs.renamed_settings import MOVED, RENAMED, find_old_names
from tests.chat_server import ChatServer, http_response

ROOT = Path(__file__).resolve().parents[3]
SECRET = "PASSW0RD"
NANO = "experiments/configs/nano"
PLANTED = {
    "an endpoint's URL": (evaluate, ["--endpoint.base_url", f"http://user:{SECRET}@127.0.0.1:1/v1"]),
    "a token in a URL": (evaluate, [f"--endpoint.base_url=http://{SECRET}@127.0.0.1:1/v1"]),
    "an extractor's URL": (evaluate, [f"--extractor.base_url=http://user:{SECRET}@127.0.0.1:1/v1"]),
    "a key as a field": (evaluate, [f'--endpoint.extra_body={{"api_key": "{SECRET}"}}']),
    "a key in place of its variable": (synthesize, [f"--endpoint.api_key_env=sk-{SECRET}0123456789"]),
    "a key in a query": (synthesize, [f"--endpoint.base_url=http://127.0.0.1:1/v1?api_key={SECRET}"]),
    "a model's URL": (evaluate, [f"--model=https://user:{SECRET}@huggingface.co/a/b"]),
    "a rollout server": (
        train,
        [f"--config={NANO}/grpo.yaml", f"--model.rollout.vllm.servers=['http://user:{SECRET}@127.0.0.1:1/v1']"],
    ),
    "an override of a phase": (
        pipeline,
        [f"--config={NANO}/pipeline.yaml", f"--overrides.evaluation=--model https://user:{SECRET}@host/m"],
    ),
    "a key in the middle": (ablations, [f"--config={NANO}/ablations.yaml", "--seeds", f"hf_{SECRET}0123456789"]),
}


def test_ctrl_c_ends_a_command_with_a_line(capsys: pytest.CaptureFixture) -> None:
    @command
    def main(args: list[str] | None = None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 130 and capsys.readouterr().err == "\nstopped by Ctrl-C\n"


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_secret_is_refused_and_repeated_nowhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    entry, args = PLANTED[name]
    args = [str(ROOT / arg) if arg.startswith(NANO) else arg.replace(f"={NANO}", f"={ROOT / NANO}") for arg in args]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        entry.main(args)
    shown = str(caught.value) + "".join(capfd.readouterr())
    field = next(arg for arg in reversed(args) if arg.startswith("--")).partition("=")[0]
    assert "environment variable" in shown and field in shown
    assert SECRET not in shown
    assert shown.count("\n") <= 4
    assert contents(tmp_path) == {}


def test_a_secret_in_a_configuration_is_named_by_its_line(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"model: gpt-4o\nendpoint:\n  base_url: http://user:{SECRET}@127.0.0.1:1/v1\n")
    for args in (["--config", str(config)], [f"--config={config}"]):
        with pytest.raises(SystemExit, match=r"mine\.yaml, line 3, holds a URL with") as caught:
            evaluate.main(args)
        assert SECRET not in str(caught.value) + "".join(capfd.readouterr())


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_setting_is_answered_with_the_new_one(old: str, tmp_path: Path) -> None:
    file, (*_, name) = tmp_path / "mine.yaml", old.split(".")
    file.write_text(f"model:\n  class_path: a.B\n  init_args:\n    # {name}: what it was\n    {name}: absolute\n")
    cure = re.escape(f"line 5: the setting {old} has been renamed. Write {RENAMED[old]} instead")
    with pytest.raises(SystemExit, match=cure):
        refuse_credentials(["--config", str(file)])
    for flag in (f"--model.{name}", f"--model.init_args.{name}"):
        with pytest.raises(SystemExit, match=rf"^{flag}: the setting {old} has been renamed"):
            refuse_credentials([f"{flag}=0.5"])
        with pytest.raises(SystemExit, match=rf"^--overrides.grpo: the setting {old} has been renamed"):
            refuse_credentials([f"--overrides.grpo=--trainer.devices=2 {flag}=0.5"])
    file.write_text(
        f"parameters:\n  model.init_args.{name}: {{values: [1]}}\nrows:\n  a: {{overrides: --model.{name}=1}}\n"
    )
    with pytest.raises(SystemExit) as caught:
        refuse_credentials([f"--config={file}", f"--model.{name}", "0.5"])
    assert [line.partition(": the setting")[0][-8:] for line in str(caught.value).splitlines()] == [
        *(", line 2", ", line 4"),
        f"--model.{name}"[-8:],
    ]


@pytest.mark.parametrize("name", [old.rpartition(".")[2] for old in RENAMED if "." in old])
def test_a_setting_of_the_same_name_elsewhere_is_no_old_one(name: str, tmp_path: Path) -> None:
    """`temperature` and `max_new_tokens` of a callback, of `decoding` and of a teacher; and the new places."""
    file = tmp_path / "mine.yaml"
    groups = ("decoding", "model.rollout", "model.loss", "model.update", "teacher")
    lines = [f"{group}:\n  {name}: 1\n" for group in groups if "." not in group]
    lines += [f"model:\n  init_args:\n    rollout: {{{name}: 1}}\n    loss: {{{name}: 1}}\n    update: {{{name}: 1}}\n"]
    lines += [f"trainer:\n  callbacks:\n    - class_path: a.B\n      init_args: {{{name}: 1}}\n", f"{name}: 1\n"]
    file.write_text("".join(lines))
    refuse_credentials(["--config", str(file), *(f"--{group}.{name}=1" for group in groups), f"--{name}", "1"])


def test_no_configuration_of_the_project_has_an_old_name() -> None:
    for file in sorted((ROOT / "experiments/configs").rglob("*.yaml")):
        assert find_old_names(file.read_text()) == [], file


@pytest.mark.parametrize("old", MOVED)
def test_a_class_path_that_has_moved_is_answered_with_the_new_one(old: str, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"trainer:\n  callbacks:\n    - class_path: {old}Guard\n")
    with pytest.raises(SystemExit, match=rf"line 3: {old}\* has moved. Write {MOVED[old]}\* instead"):
        train.main(["--config", str(config)])
    assert (ROOT / (MOVED[old].strip(".").replace(".", "/") + ".py")).is_file()


@pytest.mark.parametrize("status", [200, 401, 500])
def test_secrets_of_the_environment_are_in_no_output(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The server answers well, or refuses and repeats the key and the login that it was sent."""
    monkeypatch.setattr(write, "REPLICAS", {key: (*value[:2], 2) for key, value in write.REPLICAS.items()})
    secrets = {"MY_KEY": "plain-key-of-mine", "MY_LOGIN": f"user:{SECRET}"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    echo = f'{{"error": {{"message": "who is plain-key-of-mine, {SECRET}?"}}}}'.encode()
    answer = "The answer is B." if status == 200 else http_response(status, echo)
    with ChatServer(lambda request: answer) as server:
        args = ["--model=gpt-4o", "--bench=blink", "--replicas=true", "--decoding.max_new_tokens=6"]
        args += ["--endpoint.attempts=1", f"--endpoint.base_url={server.base_url}", f"--data_root={tmp_path / 'data'}"]
        args += ["--endpoint.api_key_env=MY_KEY", "--endpoint.basic_auth_env=MY_LOGIN", f"--output={tmp_path / 'out'}"]
        if status == 200:
            evaluate.main(args)
            shown = ""
        else:
            with pytest.raises(SystemExit, match=r"who is \*\*\*, \*\*\*\?") as caught:
                evaluate.main(args)
            shown = str(caught.value)
        assert server.requests
    shown += "".join(capfd.readouterr())
    written = b"".join(contents(tmp_path).values())
    for value in (secrets["MY_KEY"], SECRET):
        assert value not in shown
        assert value.encode() not in written


def test_every_entry_point_refuses_secrets_first() -> None:
    found = 0
    for file in sorted((ROOT / "experiments").rglob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == "main" and file.name != "vllm_server.py":
                found += 1
                decorators = [ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list]
                assert "command" in decorators, file
    assert found >= 15
