"""What the mount kind `nfs` is made of: its options, how a server is asked first, and what errors mean."""
