"""What the iscsi driver is made of: a login of our own, portals, and the two ways to a logical unit."""
