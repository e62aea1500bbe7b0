"""Methods of steering, one file each: edits and samplers, and the table of samplers by name."""
