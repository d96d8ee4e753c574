"""What the rbd driver is made of: monitors, options, keys, and the two ways to an image."""
