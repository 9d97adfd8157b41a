"""What many images share: fitted on a training split by a plain function, then judged on other images."""
