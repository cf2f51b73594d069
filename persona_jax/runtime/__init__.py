"""What every command runs on: command line, run folders, buckets, devices, compiler, memory."""
