"""From a checkpoint to a bundle: ONNX graphs, quantisation, parity check."""
