"""Loads the weights of ``torchaudio.models.emformer_rnnt_base`` into our student.

Models of the same form with other widths and depths (``emformer_rnnt_model``) fit too, as long as
they have what weights do not show: 8 heads, a left context of 30, GELU, frames stacked by 4.

The result computes what torchaudio's model does, in ``forward`` and chunk by chunk, while its
caches have a fixed size and a batch may mix streams of any age.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from torch import Tensor

from loquent.models.presets import torchaudio_base
from loquent.models.student import Student, StudentConfig

# torchaudio's parameter names (torchaudio/models/rnnt.py, emformer.py) -> ours.
_RENAMES = (
    (r"^transcriber\.input_linear\.", "encoder.frontend.linear."),
    (r"^transcriber\.transformer\.emformer_layers\.(\d+)\.", r"encoder.emformer.layers.\1."),
    (r"\.attention\.emb_to_key_value\.", ".key_value."),
    (r"\.attention\.emb_to_query\.", ".query."),
    (r"\.attention\.out_proj\.", ".out."),
    (r"\.pos_ff\.0\.", ".norm_ffn."),
    (r"\.pos_ff\.1\.", ".ffn_in."),
    (r"\.pos_ff\.4\.", ".ffn_out."),
    (r"\.layer_norm_input\.", ".norm_input."),
    (r"\.layer_norm_output\.", ".norm_output."),
    (r"^transcriber\.output_linear\.", "encoder.output.0."),
    (r"^transcriber\.layer_norm\.", "encoder.output.1."),
    (r"^predictor\.input_layer_norm\.", "predictor.input_norm."),
    (r"^predictor\.output_layer_norm\.", "predictor.output_norm."),
    (r"^predictor\.lstm_layers\.", "predictor.lstm."),
)


def _shape(weights: Mapping[str, Tensor]) -> StudentConfig:
    """The base model's shape with the widths and depths that the weights have."""
    base = torchaudio_base(len(weights["joiner.linear.weight"]))
    reduced, features = weights["transcriber.input_linear.weight"].shape
    layer = "transcriber.transformer.emformer_layers.0."
    ffn_dim, dim = weights[f"{layer}pos_ff.1.weight"].shape
    if dim != reduced * base.encoder.frontend.subsampling:
        raise ValueError(
            f"layers are {dim} wide and frames {reduced}, expected four frames side by side"
        )
    hidden = weights["predictor.lstm_layers.0.p2g.weight"].shape[1]
    output = len(weights["transcriber.output_linear.weight"])
    return dataclasses.replace(
        base,
        encoder=dataclasses.replace(
            base.encoder,
            frontend=dataclasses.replace(base.encoder.frontend, features=features, dim=dim),
            emformer=dataclasses.replace(
                base.encoder.emformer,
                dim=dim,
                ffn_dim=ffn_dim,
                layers=sum(re.search(r"\.pos_ff\.1\.weight$", n) is not None for n in weights),
            ),
            output_dim=output,
        ),
        joiner_dim=output,
        predictor=dataclasses.replace(
            base.predictor,
            embedding=weights["predictor.embedding.weight"].shape[1],
            layers=sum(n.endswith(".p2g.weight") for n in weights),
            hidden=hidden,
        ),
    )


def student_from_torchaudio(weights: Mapping[str, Tensor]) -> Student:
    """A student with the weights of ``emformer_rnnt_base(num_symbols)``, in eval mode.

    Args:
        weights: its ``state_dict()``; the number of symbols is read off it, the last is the blank.

    Raises:
        ValueError: these are not that model's weights.
    """
    if "joiner.linear.weight" not in weights:
        raise ValueError(
            "no joiner.linear.weight among the weights; expected the state_dict of "
            "torchaudio.models.emformer_rnnt_base"
        )
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    try:
        student = Student(_shape(weights))
        student.load_state_dict(renamed)
    except KeyError as error:
        raise ValueError(f"not the weights of emformer_rnnt_base: {error} is missing") from error
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"not the weights of emformer_rnnt_base: {error}") from error
    return student.eval()
