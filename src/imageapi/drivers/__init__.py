"""The kinds of attachments and mounts: one file each, found by its name."""
