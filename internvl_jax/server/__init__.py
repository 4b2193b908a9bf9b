"""An HTTP server that speaks the OpenAI API: chat about images, embeddings of texts and images.

`requests` turns bytes from strangers into checked values or an `ApiError`, `batching` runs what
waits together on the device, `app` is the HTTP around both.
"""
