"""What the make targets and the tests run beside the service; nothing of it is installed."""
