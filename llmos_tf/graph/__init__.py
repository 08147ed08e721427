"""Analysis and surgery of traced TensorFlow graphs."""
