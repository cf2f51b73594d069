"""Estimates of the memory and time a program takes on devices that need not be present."""
