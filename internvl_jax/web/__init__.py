"""A web page for a model, made with Gradio: a tab for each thing that it can do.

`site` holds what the tabs share; each tab is a file with the functions behind it and its layout;
`page` puts them together, `guard` stands between them and the network, `app` serves both.
"""
