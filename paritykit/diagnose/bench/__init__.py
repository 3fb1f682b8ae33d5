"""Small stand-ins for the reference's modules, computed from its recorded tensors; each must give its numbers first."""
