if __name__ == "train":  # from a checkout's root
    raise ImportError("`train` is a folder of the package zoo; import zoo.train", name=__name__)
