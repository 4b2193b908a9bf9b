"""What can be wrong with one record of the data, under one name each."""

CAUSES = {
    "truncated": "the file ends inside the record",
    "corrupt_record": "the container's checksum or framing does not hold",
    "corrupt_image": "no decoder reads the image",
    "image_too_large": "the image's header claims more pixels than are allowed",
    "missing_image": "the record's image is not there",
    "missing_text": "the record has neither caption nor conversation",
    "invalid_text": "the text is not UTF-8, or not a text",
    "invalid_json": "the record is not valid JSON, or not an object",
    "invalid_conversation": "turns do not alternate, or images and marks do not agree",
    "too_long": "the images do not fit into the text length beside the text",
    "outside_root": "the image lies outside the data's folder",
    "language": "no caption in a language that the pipeline reads",
}


class RecordError(ValueError):
    """A record that cannot be used. Pipelines skip it, count it by cause and take another.

    cause: a key of CAUSES; place: file and line, member or number of the record.
    """

    def __init__(self, cause: str, message: str, place: str = ""):
        assert cause in CAUSES, cause
        super().__init__(f"{place}: {message}" if place else message)
        self.cause, self.message, self.place = cause, message, place

    def __reduce__(self):  # it crosses from worker processes
        return RecordError, (self.cause, self.message, self.place)

    def at(self, place: str) -> "RecordError":
        """The same error with the place that its maker did not know."""
        return self if self.place else RecordError(self.cause, self.message, place)
