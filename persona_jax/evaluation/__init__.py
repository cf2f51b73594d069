"""Evaluators of generated images, the networks that they look with, and reports."""
