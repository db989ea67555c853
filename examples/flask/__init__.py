"""The application of this guide."""
