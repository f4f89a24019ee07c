"""The Observatory's subjects: five architectures, small ones that ship trained, and the real ones' shapes."""
