"""Loads the weights of ``torchaudio.models.emformer_rnnt_base`` into our student.

The result computes what torchaudio's model does, in ``forward`` and chunk by chunk, while its
caches have a fixed size and a batch may mix streams of any age.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from loquent.models.presets import torchaudio_base
from loquent.models.student import Student

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
    student = Student(torchaudio_base(len(weights["joiner.linear.weight"])))
    try:
        student.load_state_dict(renamed)
    except RuntimeError as error:
        raise ValueError(f"not the weights of emformer_rnnt_base: {error}") from error
    return student.eval()
