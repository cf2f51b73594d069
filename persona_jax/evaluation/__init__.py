"""Evaluators of generated images, their networks, and reports."""
