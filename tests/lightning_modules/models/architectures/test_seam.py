"""Only a family's own file names the modules inside a model. Nothing is imported: files are read with ast."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
ARCHITECTURES = "lightning_modules/models/architectures"  # the only place where these names are allowed
INSIDE = {
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "q_norm", "k_norm",
    "self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "ln_q", "norm1", "norm2",
    "language_model", "visual", "merger", "patch_embed", "blocks", "embed_tokens",
    "rotary_emb", "mrope_section", "rope_parameters", "get_image_features", "qwen2_5_vl",
    "hidden_act", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "head_dim", "layer_idx",
}  # fmt: skip


def named(source: str) -> Iterator[str]:
    """Attributes and parts of strings in `source`, without docstrings."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield from re.findall(r"\w+", node.value)


def knowledge(root: Path) -> set[tuple[str, str]]:
    """(file, name) of every module inside a model that a file outside the architectures names."""
    files = [file for file in (root / "lightning_modules").rglob("*.py") if ARCHITECTURES not in file.as_posix()]
    return {(str(file.relative_to(root)), name) for file in files for name in named(file.read_text()) if name in INSIDE}


def test_no_other_file_knows_the_inside_of_a_model() -> None:
    assert knowledge(ROOT) == set()


@pytest.mark.parametrize(
    "line", ["layer.self_attn.q_proj(x)", "getattr(model, 'visual')", "PREFIX = 'model.visual.'", "f'{a}.mlp.up_proj'"]
)
def test_an_added_name_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / ARCHITECTURES).mkdir(parents=True)
    (tmp_path / ARCHITECTURES / "own.py").write_text(line)
    assert knowledge(tmp_path) == set()
    (tmp_path / "lightning_modules/other.py").write_text(f'"""Names q_proj in words."""\n{line}\n')
    assert knowledge(tmp_path) != set()
