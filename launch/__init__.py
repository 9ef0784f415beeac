"""TorchX components and the run descriptions that ship with shardrec."""
