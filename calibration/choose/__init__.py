"""From measurements to the policy that is fastest."""
