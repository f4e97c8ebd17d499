"""Show samples on a page before training: `make inspect DATA=data/nano/shards/sft`.

The page needs no network. It shows the first and some random samples of shards, every image with its boxes, and
statistics of the shards. With a model (its processor is enough), it counts tokens, and shows which samples the
encoder would reject and why.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from datamodules.encoding.encoder import EncodedSample, Encoder
from datamodules.encoding.messages import PromptStyle
from datamodules.persistence.files import read_json, write_atomic
from datamodules.samples.boxes import BoxFormat
from datamodules.samples.sample import LoadedSample, SampleError
from datamodules.streaming.shard_reader import ShardReader
from experiments.reports.samples_page import Shown, count_tables, rejection_tables, render_samples
from experiments.runs.commands import command
from experiments.runs.usage_errors import PlainParser

IMPORT_REPORT = "import.json"


def inspect(
    data: Sequence[str],
    output: Path,
    model: str = "",
    first: int = 10,
    drawn: int = 10,
    measured: int = 300,
    seed: int = 0,
    max_prompt_tokens: int = 4096,
) -> Path:
    """Write the page of some shards; returns its path.

    Args:
        data: folders of shards, or other sources of `ShardReader`.
        output: file of the page.
        model: folder or Hub name of a model; its processor counts tokens. Without it, no tokens are counted.
        first: number of samples from the beginning.
        drawn: number of random samples.
        measured: number of samples for the statistics, spread evenly over the shards.
        seed: seed of the random choice.
        max_prompt_tokens: longer prompts are rejected, as in training.

    Raises:
        ValueError: a number is negative, or `data` has no sample.
    """
    if min(first, drawn, measured) < 0:
        raise ValueError(f"first={first}, drawn={drawn}, measured={measured} must not be negative")
    reader = ShardReader(list(data))
    style, limits = PromptStyle.THINK, (max_prompt_tokens, max_prompt_tokens)
    encoder = Encoder(model, BoxFormat.ABSOLUTE_PIXELS, style, *limits, with_target=False) if model else None
    chosen = random.Random(seed).sample(range(reader.count), min(drawn, reader.count))
    groups = {
        f"First {min(first, reader.count)}": range(min(first, reader.count)),
        f"{len(chosen)} at random": sorted(chosen),
    }
    shown = {heading: [_show(reader, encoder, number) for number in numbers] for heading, numbers in groups.items()}
    count = min(measured, reader.count)
    counted = [_show(reader, encoder, place * reader.count // count) for place in range(count)]
    tables = count_tables(counted)
    for folder in data:
        tables |= rejection_tables(read_json(Path(folder) / IMPORT_REPORT))
    note = f"{reader.count:,} samples; the tables count {len(counted):,} of them, evenly over the shards."
    note += f" Tokens and sizes are those of {model}." if model else ""
    write_atomic(output, render_samples(f"Samples of {', '.join(map(str, data))}", shown, tables, note))
    return output


def _show(reader: ShardReader, encoder: Encoder | None, number: int) -> Shown:
    """Read one sample of the shards; encode it if there is an encoder."""
    loaded: LoadedSample | SampleError
    encoded: EncodedSample | SampleError | None = None
    try:
        loaded = reader.read(number)
    except SampleError as error:
        return Shown(f"sample {number}", error)
    if encoder is not None:
        try:
            encoded = encoder.encode(loaded)
        except SampleError as error:
            encoded = error
    return Shown(f"sample {number}", loaded, encoded)


@command(failed="nothing to inspect")
def main(args: list[str] | None = None) -> None:
    """Entry point of `make inspect`."""
    parser = PlainParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="+", required=True, help="folders of shards")
    parser.add_argument("--output", type=Path, default=Path("outputs/inspect/index.html"), help="file of the page")
    parser.add_argument("--model", default="", help="whose processor counts tokens; without one none are counted")
    parser.add_argument("--first", type=int, default=10, help="samples to show from the beginning")
    parser.add_argument("--random", type=int, default=10, dest="drawn", help="samples to show at random")
    parser.add_argument("--measured", type=int, default=300, help="samples that the tables count")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--max_prompt_tokens", type=int, default=4096, help="longer prompts are rejected")
    print(f"wrote {inspect(**vars(parser.parse_args(args)))}")


if __name__ == "__main__":
    main()
