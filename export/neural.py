"""``loquent lm neural``: a recurrent word model beside the n-gram of a bundle, learnt from text.

What is written is RUN/last: only the last steps look at all words, which makes probabilities of
scores.

It knows more than two words back, and words like those that it has seen; the n-gram knows what is
said again and again. A word is worth what both think of it (`loquent.engine.decode.neural`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from loquent.engine.bundle import META_FEATURES, META_SCHEMA, META_TOKENS, SCHEMA, Bundle
from loquent.engine.ngram import Ngram
from loquent.engine.wordlm import words_sha256
from loquent.export.bundle import file_entry, update_manifest
from loquent.export.graphs import export_graph, set_metadata
from loquent.export.quantise import quantise_int8
from loquent.models.data import DataError
from loquent.models.loop import LoopConfig
from loquent.models.ngram import add_text_options, read_sentences, read_texts
from loquent.models.options import RESUMES, add_loop_options, guarded, loop_settings, start_torch
from loquent.models.wordlm import (
    WordLm,
    WordLmConfig,
    WordLmTrainer,
    choose_words,
    count_words,
    load_word_lm,
)

GRAPH = "words.onnx"
SHARE = 0.5


class _Step(nn.Module):
    """One word, by its id in the n-gram: its score, and what follows.

    The table is kept in 8 bits with a scale for each row. Words of the n-gram without a row are
    taken for the unknown word, of whose probability each has the share that the n-gram gives it.

    Shapes: N words, G words of the n-gram, V rows of the table, P their width, H the LSTM's.
    """

    row_G: Tensor
    bias_G: Tensor
    table_VP: Tensor
    scale_V: Tensor

    def __init__(self, model: WordLm, ngram: Ngram) -> None:
        super().__init__()
        own = {word: i for i, word in enumerate(model.config.words)}
        rows = torch.tensor([own.get(word, 0) for word in ngram.words])
        unigrams = torch.tensor([ngram.unigram(i) for i in range(len(ngram.words))])
        strange = rows == 0
        share = torch.where(strange, unigrams - unigrams[strange].logsumexp(0), torch.zeros(1))
        weight = model.table.weight.detach()
        scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        self.register_buffer("row_G", rows.int())
        self.register_buffer("bias_G", model.bias.detach()[rows] + share)
        self.register_buffer("table_VP", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale_V", scale)
        lstm = dict(model.lstm.named_parameters())
        self.gates = nn.Linear(model.config.width + model.config.hidden, 4 * model.config.hidden)
        with torch.no_grad():
            self.gates.weight.copy_(torch.cat([lstm["weight_ih_l0"], lstm["weight_hh_l0"]], 1))
            self.gates.bias.copy_(lstm["bias_ih_l0"] + lstm["bias_hh_l0"])
        self.out = model.out

    def forward(
        self, word_N: Tensor, out_NP: Tensor, hidden_NH: Tensor, cell_NH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        row_N = self.row_G[word_N].long()
        x_NP = self.table_VP[row_N].float() * self.scale_V[row_N][:, None]
        logp_N = (x_NP * out_NP).sum(1) + self.bias_G[word_N]
        gates = self.gates(torch.cat([x_NP, hidden_NH], dim=1))
        take, keep, new, give = gates.chunk(4, dim=1)
        cell_NH = keep.sigmoid() * cell_NH + take.sigmoid() * new.tanh()
        hidden_NH = give.sigmoid() * cell_NH.tanh()
        return logp_N, self.out(hidden_NH), hidden_NH, cell_NH


def write_neural(model: WordLm, folder: Path, *, share: float) -> Bundle:
    """Put a word model beside the n-gram of a bundle, in place of the one that it may have.

    Args:
        model: trained.
        folder: of the bundle.
        share: of it in the probability of a word.

    Raises:
        DataError: the bundle has no n-gram.
        BundleError: it is none.
    """
    bundle = Bundle.load(folder)
    ngram = _ngram(bundle)
    states = {"out": model.config.width, "hidden": model.config.hidden, "cell": model.config.hidden}
    batch = {0: Dim("batch", min=1)}
    rows = [torch.zeros(2, size) for size in states.values()]
    metadata = {
        META_SCHEMA: str(SCHEMA),
        META_FEATURES: bundle.features.digest(),
        META_TOKENS: bundle.tokens_sha256,
    }
    with tempfile.TemporaryDirectory() as scratch:
        graph = Path(scratch) / GRAPH
        export_graph(
            _Step(model, ngram),
            (torch.zeros(2, dtype=torch.int64), *rows),
            ["word", *(f"state.{name}" for name in states)],
            ["logp", *(f"next.{name}" for name in states)],
            (batch,) * 4,
            graph,
        )
        if bundle.precision == "int8":
            quantise_int8(graph, graph)
        set_metadata(graph, metadata)
        (folder / GRAPH).write_bytes(graph.read_bytes())
    neural = {
        **file_entry(folder, GRAPH),
        "words_sha256": words_sha256(ngram.words),
        "share": share,
        "states": [
            {"name": name, "shape": [size], "dtype": "float32", "init": 0}
            for name, size in states.items()
        ],
    }
    update_manifest(folder, lm=dict(bundle.manifest["lm"]) | {"neural": neural})
    return Bundle.load(folder)


def _ngram(bundle: Bundle) -> Ngram:
    ngram = bundle.language_model()
    if ngram is None:
        raise DataError(
            f"{bundle.files.where}: it has no word n-gram, beside which this one would be used; "
            "give it one with `loquent export --lm`"
        )
    return ngram


def _run(args: argparse.Namespace) -> None:
    start_torch(args)
    if not Path(args.bundle).is_dir() and args.write:
        raise DataError(f"got --write with {args.bundle}, expected a bundle's folder to write to")
    if not 0 < args.share <= 1:
        raise DataError(f"--share: got {args.share:g}, expected more than 0 and at most 1")
    ngram = _ngram(Bundle.load(args.bundle))
    shape = WordLmConfig(words=(), width=args.width, hidden=args.hidden)
    paths: list[Path] = args.text
    sentences = read_texts(paths, args.exclude_licence)
    dev = list(read_sentences(args.dev))
    if not sentences or not dev:
        raise DataError("got no text to learn from, or none in --dev")
    counts = count_words(sentences)
    shape = replace(shape, words=choose_words(ngram, counts, args.words))
    origin = {
        "text": [path.name for path in paths],
        "words": sum(counts.values()),
        "excluded_licences": args.exclude_licence,
    }
    config = LoopConfig(**loop_settings(args))
    trainer = WordLmTrainer(
        args.run, shape, sentences, dev, config, origin, batch_words=args.batch_words
    )
    trainer.fit()
    if trainer.devices.rank:
        return
    print(json.dumps({"run": str(args.run), **vars(trainer.progress)}))
    if args.write:
        model, _ = load_word_lm(args.run / "last")
        bundle = write_neural(model, Path(args.bundle), share=args.share)
        size = (Path(args.bundle) / GRAPH).stat().st_size / 1e6
        print(f"{args.bundle}: {bundle.name} has {GRAPH} now, {size:.1f} MB")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="loquent lm neural", description=__doc__, epilog=RESUMES)
    add_text_options(parser, nargs="+")
    parser.add_argument(
        "--bundle", required=True, help="whose n-gram it stands beside: a folder, or a name"
    )
    parser.add_argument("--dev", required=True, type=Path, help="text or manifest to watch")
    parser.add_argument("--run", required=True, type=Path, help="folder of the run")
    parser.add_argument("--words", type=int, default=20_000, help="with a row (%(default)s)")
    parser.add_argument("--width", type=int, default=192, help="of a row (%(default)s)")
    parser.add_argument("--hidden", type=int, default=512, help="of the LSTM (%(default)s)")
    parser.add_argument(
        "--batch-words", type=int, default=2560, help="with padding (default %(default)s)"
    )
    parser.add_argument(
        "--share",
        type=float,
        default=SHARE,
        help="of it in the probability of a word; the n-gram has the rest (%(default)s)",
    )
    parser.add_argument("--write", action="store_true", help="put it into the bundle")
    add_loop_options(parser, steps=8000, batch_seconds=None, lr=2e-3, head_lr=None)
    parser.set_defaults(decay=4800)
    args = parser.parse_args(argv)
    return guarded(parser, lambda: _run(args))
