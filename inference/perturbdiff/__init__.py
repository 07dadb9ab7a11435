"""PerturbDiff learned from `Populations`: data stream, training that resumes, sampling, files of the published kind."""
