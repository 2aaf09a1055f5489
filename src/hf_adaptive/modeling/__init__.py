"""Everything that travels with a checkpoint. One flat folder: see CONTRIBUTING.md."""
