"""Forms of a record: the one schema of JSON, JSONL, CSV, parquet, tars and indexed tars.

    fields of a record --fields.py---> read | ignored on purpose | told in the report
    its texts          --messages.py-> messages in LLaVA's form
    its images         --images.py---> bytes, names or members of the tar
    all of them        --reading.py--> Reading, or the fault of the record

An image that a record names is read, or the record is refused: a text-only sample is made only of a
record in which nothing speaks of an image.
"""
