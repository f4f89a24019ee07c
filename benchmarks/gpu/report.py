"""placeholder"""
def as_markdown(content): return ""
