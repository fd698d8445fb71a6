"""The version of vattn: the one place that states it. CMake and the wheel read this file."""

__version__ = "0.1.0"
