"""Actions of the page: plain data in, a stream of plain updates out. Only these modules call steer.

One module a tab. An action is a function, or a generator of dictionaries that JSON can hold; it knows no page, so that
tests and `gradio_client` get the same from it. What a person can mend is raised as a `SteerError`.
"""
