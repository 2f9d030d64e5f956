"""What is learned: each file holds one objective, an `nn.Module` from `Batch` to `Loss`."""
