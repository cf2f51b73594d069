"""What a program needs of a machine that is not there: shapes, compilation, estimates."""
