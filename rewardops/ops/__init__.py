"""What ``torch.library`` knows: schema, fake and gradient of every op, one file per family."""
