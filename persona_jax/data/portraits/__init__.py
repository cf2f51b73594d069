"""`portraits`: people drawn by a program, whose every look is known."""
