"""Devices, processes, memory and the terminal."""
