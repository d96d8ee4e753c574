"""`make bench-images`: squashfs and EROFS beside each other, by compression: size, time to build, time to read.

`formats` makes the images of one tree, `reading` mounts and reads them, `__main__` takes turns and prints.
"""
