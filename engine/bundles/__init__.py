"""The only thing that leaves training and the only thing that serving accepts."""
