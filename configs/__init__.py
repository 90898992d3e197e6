if __name__ == "configs":  # from a checkout's root
    raise ImportError("`configs` is a folder of the package zoo; import zoo.configs", name=__name__)
