"""What is measured on images and tensors, one measure per file."""
