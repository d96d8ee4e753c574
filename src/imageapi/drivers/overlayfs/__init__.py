"""What the mount kind `overlay` is made of: its options, its upper, and the mount itself."""
