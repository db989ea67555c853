"""Legacy code of eight kinds, and what makes it safe."""
