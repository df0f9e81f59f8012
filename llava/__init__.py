"""Is this face real or forged, how sure are we, and why?"""

__version__ = "0.1.0"
