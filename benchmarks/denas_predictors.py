def predictors(bench, codes):
    raise NotImplementedError
