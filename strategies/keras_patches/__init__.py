"""What is patched in Keras, and when."""
