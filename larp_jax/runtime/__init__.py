"""Devices, processes, memory, random keys, signals and progress bars."""
