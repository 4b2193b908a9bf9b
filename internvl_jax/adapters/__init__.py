"""Our models in the interfaces of other people's evaluation programs, a file each.

These files import the program that they serve, or PyTorch, and nothing else imports them.
"""
