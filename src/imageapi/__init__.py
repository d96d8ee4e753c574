"""ImageAPI: attach block images, mount them and run containers, over a small REST API.

Nothing but the version lives here, so that importing any part of the package costs only that part.
"""

__version__ = "0.1.0"
