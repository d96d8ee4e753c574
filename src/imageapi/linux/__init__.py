"""Kernel facts: one function a syscall or ioctl, under the kernel's names. Standard library only; only OSError."""
