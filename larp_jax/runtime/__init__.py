"""Devices, processes, memory, random keys, signals, progress bars and clocks."""
