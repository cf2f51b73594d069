"""`portraits2`: illustrated people at any size, whose every trait is known.

The world that the next base is trained on; `portraits` stays until that base is shipped.
"""
