"""Exercise 1: change β and predict the loss.

The pair of docs/TOUR.md has a margin a − b of 5.02 nats. With β = 0.1 its loss is 0.47. Predict the loss of
the same margin with three other β, to two decimals. Guess first, then calculate.
"""

PREDICTED = {0.05: None, 0.5: None, 1.0: None}  # the loss by β
