"""The command's tools and telemetry."""
